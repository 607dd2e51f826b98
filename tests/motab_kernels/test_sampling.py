"""`sample_from_logits` against its definition in float64 and against transformers' own processors."""

import math

import pytest
import torch
from sampling_cases import NEUTRAL, SETTINGS, assert_matches_definition, of_row, random_case, random_settings
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY, HAS_TRITON, implementation
from motab_kernels.sampling import sample_from_logits_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
NATIVE = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels"))]
BACKENDS = [*NATIVE, pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("fresh_memory_is_filled"),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_setting = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes some milliseconds for a tile whatever its size: of 512 and 1024 columns few are enough."""
    if HAS_TRITON:
        from motab_kernels.gpu import sampling as gpu

        monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.Settings(lanes=128, num_warps=4))


def sample(logits, uniforms, backend, **settings):
    """On the device of the backend; back on the host."""
    device = DEVICE if backend == "triton" else "cpu"
    settings = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
    out = mk.sample_from_logits(logits.to(device), uniforms.to(device), **settings, backend=backend)
    return mk.Samples(*(x.cpu() for x in out))


@every_backend
@every_dtype
@every_setting
def test_matches_the_definition(backend, dtype, name, seed):
    logits, uniforms = random_case(2, 3, 700, dtype=dtype, seed=seed)
    assert_matches_definition(sample(logits, uniforms, backend, **SETTINGS[name]), logits, uniforms, **SETTINGS[name])


@every_backend
@every_dtype
def test_settings_of_rows(backend, dtype, seed):
    """Of a batch whose rows differ in all of them, and of one in which some are numbers or of all rows."""
    logits, uniforms = random_case(8, 2, 300, dtype=dtype, seed=seed)
    settings = random_settings(8, seed)
    out = sample(logits, uniforms, backend, **settings)
    assert_matches_definition(out, logits, uniforms, **settings)
    some = {"temperature": settings["temperature"], "top_p": torch.tensor(0.9), "min_p": 0.02}
    assert_matches_definition(sample(logits, uniforms, backend, **some), logits, uniforms, **some)


@every_backend
@pytest.mark.parametrize("V", [40, 1300])
def test_a_row_draws_as_by_numbers(backend, V, seed):
    """To the last bit, whatever the other rows' settings are."""
    logits, uniforms = random_case(10, V, seed=seed)
    settings = random_settings(10, seed)
    drawn = sample(logits, uniforms, backend, **settings).token_ids
    for b in range(10):
        numbers = of_row(settings, b)
        assert drawn[b] == sample(logits[b : b + 1], uniforms[b : b + 1], backend, **numbers).token_ids, numbers


@every_backend
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_setting_of_rows_that_keeps_all(backend, name, seed):
    """Whichever is a tensor, and more top-k than there are tokens: to the last bit as without."""
    logits, uniforms = random_case(12, 1300, seed=seed)
    logits[:, 0] = logits.amax(-1) - 40  # which is drawn by 0, and whose weight is lost in any sum
    expected = sample(logits, uniforms, backend).token_ids
    assert expected[0] == 0
    neutral = torch.tensor(NEUTRAL[name], requires_grad=name != "top_k").expand(12)
    assert torch.equal(sample(logits, uniforms, backend, **{name: neutral}).token_ids, expected)
    if name == "top_k":
        many = torch.tensor([1300, 1301, 2**40]).repeat(4)
        assert torch.equal(sample(logits, uniforms, backend, top_k=many).token_ids, expected)


@every_backend
def test_a_top_p_that_rounds_to_0_in_float32(backend, seed):
    logits, uniforms = random_case(3, 700, seed=seed)
    for top_p in (1e-60, torch.tensor(1e-60, dtype=torch.float64)):
        assert torch.equal(sample(logits, uniforms, backend, top_p=top_p).token_ids, logits.argmax(-1))


@every_backend
def test_greedy_rows(backend):
    """The first of several, whatever their numbers and filters; the others draw on."""
    logits = torch.full((6, 300), -9.0)
    logits[:, 10], logits[:, 150], logits[:, 290] = -0.0, 0.0, 0.0
    numbers = torch.full((6,), 0.99).double()
    settings = {
        "temperature": torch.tensor([0.0, 1.0] * 3),
        "top_k": torch.tensor([0, 0, 2, 2, 0, 0]),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9, 0.9]),
        "min_p": torch.tensor([0.0, 1.0] * 3),
    }
    assert sample(logits, numbers, backend, **settings).token_ids.tolist() == [10, 290] * 3
    logits[:4, 20], logits[4:, 20] = INF, NAN
    assert not sample(logits, numbers, backend, **settings).valid.any()
    assert not sample(torch.full((6, 300), -INF), numbers, backend, **settings).valid.any()


OUT_OF_RANGE = [("temperature", x) for x in (-1.0, 1e-38, 1e38, INF, NAN)] + [("top_k", -1), ("top_k", -(2**31))]
OUT_OF_RANGE += [("top_p", x) for x in (0.0, -0.5, 1.5, INF, NAN)] + [("min_p", x) for x in (-0.5, 1.5, NAN)]


@every_backend
def test_settings_of_rows_that_do_not_fit(backend):
    """On the CPU they raise. Elsewhere, where the host does not see them, they leave their own rows invalid."""
    count = len(OUT_OF_RANGE)
    rows = {name: torch.tensor([x] * 2 * count) for name, x in NEUTRAL.items()}
    for at, (name, x) in enumerate(OUT_OF_RANGE):
        rows[name][2 * at] = x
    logits, uniforms = random_case(2 * count, 300)
    uniforms += 1e-300  # a token other than the first
    if DEVICE == "cpu" or backend != "triton":
        for at, (name, _) in enumerate(OUT_OF_RANGE):
            own = {key: x[2 * at : 2 * at + 2] for key, x in rows.items()}
            with pytest.raises(ValueError, match=rf"{name}: expected .* got \[[^,]*, {NEUTRAL[name]}\]"):
                sample(logits[:2], uniforms[2:4], backend, **own)
    if backend == "cpu":
        return
    tokens, valid = torch.zeros(2, 2 * count, dtype=torch.int64, device=DEVICE), None
    valid = tokens[1].bool()
    inputs = [x.to(DEVICE) for x in (logits, uniforms, *rows.values())]
    implementation("sampling", backend, tokens.device).sample_from_logits(*inputs, tokens[0], valid)
    assert valid.tolist() == [False, True] * count
    assert tokens[0, ::2].tolist() == [0] * count
    assert_matches_definition(mk.Samples(tokens[0, 1::2].cpu(), valid[1::2].cpu()), logits[1::2], uniforms[1::2])


@every_backend
@pytest.mark.parametrize("V", [1, 2, 7, 511, 512, 513, 1025])
def test_sizes(backend, V, seed):
    for dtype in DTYPES[:2]:
        logits, uniforms = random_case(3, V, dtype=dtype, seed=seed)
        settings = {"top_k": V - 1, "top_p": 0.97}
        assert_matches_definition(sample(logits, uniforms, backend, **settings), logits, uniforms, **settings)


@pytest.mark.parametrize("backend", NATIVE)
@every_dtype
@every_setting
def test_a_large_vocabulary(backend, dtype, name, seed):
    logits, uniforms = random_case(6, 151937, dtype=dtype, seed=seed)
    assert_matches_definition(sample(logits, uniforms, backend, **SETTINGS[name]), logits, uniforms, **SETTINGS[name])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 20, 99])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (0.5, 0.02), (1.0, 0.2), (0.95, 1.0)])
def test_as_transformers(backend, temperature, top_k, top_p, min_p):
    """Numbers at even distances draw each token as often as it is likely, after transformers' own processors."""
    count = 4000
    logits = 2 * torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    if top_p == 1:  # of tokens that are as likely transformers' top-p keeps no more than it needs
        logits[:, 7] = logits[:, 8:16].amax(-1)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    numbers = (torch.arange(count).double() + 0.5) / count
    for row, expected in zip(logits, scores.double().softmax(-1), strict=True):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        tokens = sample(row.expand(count, -1), numbers, backend, **settings).token_ids
        share = torch.bincount(tokens, minlength=40) / count
        torch.testing.assert_close(share.double(), expected, rtol=0, atol=1.1 / count)
        assert share[expected == 0].sum() == 0


@every_backend
@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 1, "top_p": 0.1}, {"min_p": 1.0}])
def test_ties_with_the_last_token_that_is_kept_are_kept(backend, settings):
    """0 and -0 are as likely too."""
    logits = torch.full((6, 300), -9.0)
    logits[:, 10], logits[:, 150], logits[:, 290] = 0.0, -0.0, 0.0
    numbers = torch.tensor([0.0, 0.3, 0.35, 0.6, 0.7, 0.99], dtype=torch.float64)
    assert sample(logits, numbers, backend, **settings).token_ids.tolist() == [10, 10, 150, 150, 290, 290]


@every_backend
@pytest.mark.parametrize(("V", "places"), [(300, (7, 299)), (2300, (1200, 2299))])
def test_few_tokens_that_can_be_drawn(backend, V, places):
    """Fewer than top-k, in one tile and in two, of which each has half of the numbers; tiles before them have none."""
    logits = torch.full((4, V), -INF)
    logits[:, places] = -3e38
    numbers = torch.tensor([0.0, 0.5 - 2.0**-54, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for settings in ({"top_k": 5}, {"top_k": 5, "top_p": 0.9}, {"top_p": 0.99}, {}):
        assert sample(logits, numbers, backend, **settings).token_ids.tolist() == [places[0]] * 2 + [places[1]] * 2


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_numbers(backend, dtype, seed):
    """Of numbers with none of their dtype between them, exactly as many are kept as are to be, whatever the last bits
    of the least; and more than there are lanes."""
    generator = torch.Generator().manual_seed(seed)
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    V = min(1024, 2**bits)
    for top_k, sign in ((1, 1), (37, 1), (38, 1), (63, -1), (V // 2, 1)):
        logits = sign * (1 + torch.randperm(V, generator=generator) * 2.0**-bits).to(dtype)[None]
        likeliest = sorted(logits[0].topk(top_k).indices.tolist())
        for place in (0, top_k // 2, top_k - 1):
            numbers = torch.tensor([(place + 0.5) / top_k], dtype=torch.float64)
            settings = {"top_k": top_k, "temperature": 1e4}  # at which all are as likely
            assert sample(logits, numbers, backend, **settings).token_ids.tolist() == [likeliest[place]]


@every_backend
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_what_cannot_be_drawn_from(backend, settings):
    rows = [[1.0, 2.0, -INF], [NAN, 1.0, 2.0], [1.0, 2.0, NAN], [-INF] * 3, [1.0, INF, 0.0], [-9e9, 3.0, -2e9]]
    for dtype, more in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 300)):
        logits = torch.nn.functional.pad(torch.tensor(rows, dtype=dtype), (0, more), value=-INF)
        out = sample(logits, torch.full((6,), 0.5).double(), backend, **settings)
        assert out.valid.tolist() == [True, False, False, False, False, True]
        assert ((out.token_ids >= 0) & (out.token_ids < 3 + more)).all()
        assert out.token_ids[0] in (0, 1)
        assert out.token_ids[5] == 1


@every_backend
@pytest.mark.parametrize("name", ["all", "every filter"])
def test_strides_and_what_lies_beyond_a_row(backend, name, seed):
    """Padded rows and tokens that NaN surrounds, numbers with a stride, a vocabulary that is not contiguous."""
    logits, uniforms = random_case(3, 2, 301, dtype=torch.bfloat16, seed=seed)
    wide, numbers = torch.full((4, 3, 320), NAN).bfloat16(), torch.full((3, 2, 2), NAN).double()
    wide[1:, :2, 3:304], numbers[..., 1] = logits, uniforms
    out = sample(wide[1:, :2, 3:304], numbers[..., 1], backend, **SETTINGS[name])
    assert_matches_definition(out, logits, uniforms, **SETTINGS[name])
    turned = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(sample(turned, uniforms, backend, **SETTINGS[name]).token_ids, out.token_ids)
    assert torch.equal(sample(logits[:, 0], uniforms[:, 0], backend, **SETTINGS[name]).token_ids, out.token_ids[:, 0])


@every_backend
@pytest.mark.parametrize("name", ["all", "top-p", "every filter"])
def test_a_row_draws_the_same_in_any_batch(backend, name, seed):
    logits, uniforms = random_case(4, 300, seed=seed)
    whole = sample(logits, uniforms, backend, **SETTINGS[name]).token_ids
    alone = [sample(logits[i : i + 1], uniforms[i : i + 1], backend, **SETTINGS[name]).token_ids for i in range(4)]
    assert torch.equal(whole, torch.cat(alone))


@every_backend
def test_temperatures(backend):
    """0 is the likeliest token, the first of several, and so is the least; at the largest all are as likely."""
    logits = 1e7 * torch.randn(6, 9)
    logits[:, 8] = logits.amax(-1)
    numbers = torch.tensor([0.0, 0.01, 0.2, 0.3, 0.4, 0.49], dtype=torch.float64)
    for temperature in (0, 1e-30):
        out = sample(logits, numbers, backend, temperature=temperature)
        assert out.valid.all()
        assert torch.equal(out.token_ids, logits.argmax(-1))
    assert sample(logits, numbers, backend, temperature=1e30).token_ids.tolist() == [0, 0, 1, 2, 3, 4]
    assert sample(logits, numbers, backend, temperature=1e30, top_p=0.5).token_ids.tolist() != [8] * 6


@every_backend
def test_no_rows(backend):
    out = sample(torch.randn(0, 4, 9), torch.rand(0, 4).double(), backend)
    assert out.token_ids.shape == out.valid.shape == (0, 4)
    assert sample(torch.randn(3, 0, 9), torch.rand(3, 0).double(), backend, temperature=0).token_ids.shape == (3, 0)
    rows = {"temperature": torch.ones(0), "top_k": torch.ones(0, dtype=torch.int32), "top_p": torch.ones(())}
    assert sample(torch.randn(0, 4, 9), torch.rand(0, 4).double(), backend, **rows).token_ids.shape == (0, 4)


@every_backend
def test_negated_views(backend):
    logits, uniforms = random_case(4, 300)
    negated, top_p = (torch._neg_view(-x) for x in (uniforms, torch.full((4,), 0.7)))
    out = sample(torch._neg_view(-logits), negated, backend, top_k=9, top_p=top_p)
    assert_matches_definition(out, logits, uniforms, top_k=9, top_p=0.7)


def test_float64():
    """Which "torch" computes in: in float32 all these were as likely."""
    logits = torch.tensor([[1e9, 1e9 + 1, 1e9 + 2]], dtype=torch.float64)
    numbers = torch.tensor([0.09], dtype=torch.float64)
    assert mk.sample_from_logits(logits, numbers).token_ids == 0
    assert mk.sample_from_logits(logits, numbers + 0.01).token_ids == 1


def test_compiled():
    """The op is registered; logits with a gradient give tokens without."""
    logits, uniforms = random_case(4, 2, 300)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def drawn(logits, uniforms):
        return mk.sample_from_logits(2 * logits, uniforms, temperature=0.7, top_k=20, top_p=0.9)

    eager = mk.sample_from_logits(2 * logits, uniforms, temperature=0.7, top_k=20, top_p=0.9)
    out = drawn(logits.requires_grad_(), uniforms)
    assert torch.equal(out.token_ids, eager.token_ids)
    assert torch.equal(out.valid, eager.valid)
    torch.library.opcheck(sample_from_logits_op, (logits.detach(), uniforms, [], 0.7, 20, 0.9, 0.0, "torch"))


def test_compiled_with_numbers_that_vary():
    logits, uniforms = random_case(4, 300)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def drawn(logits, uniforms, **settings):
        return mk.sample_from_logits(logits, uniforms, **settings).token_ids

    for settings in ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"temperature": 1.5, "top_k": 3, "top_p": 0.5}):
        eager = mk.sample_from_logits(logits, uniforms, **settings).token_ids
        assert torch.equal(drawn(logits, uniforms, **settings), eager)


def test_compiled_with_settings_of_rows():
    """Whose values change without another compilation; those of the example do not matter."""
    logits, uniforms = random_case(4, 2, 300)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def drawn(logits, uniforms, temperature, top_k):
        return mk.sample_from_logits(logits, uniforms, temperature=temperature, top_k=top_k, top_p=0.9).token_ids

    for seed in range(3):
        rows = random_settings(4, seed)
        settings = {"temperature": rows["temperature"].double().contiguous().requires_grad_()}
        settings["top_k"] = rows["top_k"].long().contiguous()
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            tokens = drawn(logits, uniforms, **settings)
        assert torch.equal(tokens, mk.sample_from_logits(logits, uniforms, **settings, top_p=0.9).token_ids)
    rows = [settings["temperature"].detach(), torch.tensor(0.9).expand(4)]
    torch.library.opcheck(sample_from_logits_op, (logits, uniforms, rows, None, 20, None, 0.0, "torch"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"temperature: expected 0 .* from 1e-30 to 1e\+30, got -1.0"),
        ({"temperature": 1e-38}, "temperature: .* got 1e-38"),
        ({"temperature": NAN}, "temperature: .* got nan"),
        (
            {"temperature": torch.ones(3)},
            r"temperature: expected a number or a tensor, 0-d or \(2,\), on cpu, got shape",
        ),
        ({"temperature": torch.ones(2, 1)}, r"temperature: .* got shape \(2, 1\) on cpu"),
        ({"top_p": torch.ones(2, device="meta")}, r"top_p: .* on cpu, got shape \(2,\) on meta"),
        (
            {"top_k": torch.ones(2)},
            "top_k: expected a number or a tensor of torch.int32 or torch.int64, got torch.float32",
        ),
        ({"min_p": torch.ones(2).half()}, "min_p: expected .* torch.float32 or torch.float64, got torch.float16"),
        ({"min_p": torch.ones(2), "top_k": -1}, "top_k: expected an integer >= 0, got -1"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature: expected 0 .* 1e\+30, got \[1.0, -1.0\]"),
        ({"top_p": torch.tensor([1.0, 0.0]), "backend": "torch"}, r"top_p: expected a number in .* got \[1.0, 0.0\]"),
        ({"top_k": -1}, "top_k: expected an integer >= 0, got -1"),
        ({"top_k": 2.5}, "top_k: .* got 2.5"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\].*, got 0.0"),
        ({"top_p": 1.5}, "top_p: .* got 1.5"),
        ({"min_p": -0.1}, r"min_p: expected a number in \[0, 1\].*, got -0.1"),
        ({"min_p": NAN}, "min_p: .* got nan"),
        ({"uniforms": torch.zeros(3).double()}, r"uniforms: expected \(2,\) float64 on cpu, got \(3,\) torch.float64"),
        ({"uniforms": [0.5, 0.5]}, "uniforms: expected a tensor, got list"),
        ({"uniforms": torch.zeros(2)}, r"uniforms: .* got \(2,\) torch.float32"),
        ({"uniforms": torch.tensor([0.0, 1.0]).double()}, r"uniforms: expected values in \[0, 1\), got \[0.0, 1.0\]"),
        ({"uniforms": torch.tensor([0.0, NAN]).double()}, r"uniforms: .* got \[0.0, nan\]"),
        ({"uniforms": torch.tensor([0.0, -0.5]).double(), "backend": "torch"}, r"uniforms: .* got \[0.0, -0.5\]"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected shape .* with V > 0, got \(2, 0\)"),
        ({"logits": torch.zeros(5)}, r"logits: expected shape \(B, V\) or \(B, T, V\)"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, "logits: expected float32, .* got torch.int64"),
        ({"logits": torch.zeros(2, 5).to_sparse()}, "logits: expected a dense tensor, got .*sparse"),
        ({"backend": "numpy"}, "backend: expected one of .* got 'numpy'"),
    ],
)
def test_what_does_not_fit(changes, message):
    arguments = {"logits": torch.zeros(2, 5), "uniforms": torch.zeros(2).double(), **changes}
    with pytest.raises(ValueError, match=message):
        mk.sample_from_logits(**arguments)
