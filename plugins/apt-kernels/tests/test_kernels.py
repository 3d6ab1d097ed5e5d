"""The products of every instruction set that this processor has, against dense matrices."""

import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest
import torch
from apt_kernels import LEVEL, DenseMatrix, Matrix, available, in_large_pages, library, memory
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not available(), reason="installed without a compiler")
HERE = library.SERVED
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
GROUP = 128

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
if SANITIZED:  # in a region, reads behind a copy would not be found
    memory._reserved = lambda size: torch.zeros(size, dtype=torch.uint8)


def bitmask(kept):
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(kept, (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    return (padded * (1 << torch.arange(8))).sum(2).to(torch.uint8)


def nibbles(values):
    padded = torch.nn.functional.pad(values + 8, (0, len(values) % 2)).view(-1, 2)
    return (padded[:, 0] | (padded[:, 1] << 4)).to(torch.uint8)


def packed(rows, columns, share, kind, seed, group=GROUP, pattern="", scale=1.0):
    """A matrix in fp64 and the same one packed.

    ``pattern``: "same" for one mask in all rows, "empty" for every second row without values.
    ``scale``: the largest scale of integers.
    """
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=draw) >= share
    if pattern == "same":
        kept[:] = kept[0].clone()
    elif pattern == "empty":
        kept[::2] = False
    mask = bitmask(kept)
    if kind in FLOATS:
        dense = torch.randn(rows, columns, generator=draw).to(kind) * kept
        return dense.double(), Matrix(columns, mask, dense[kept])
    low, high = (-8, 8) if kind == "int4" else (-128, 128)
    whole = torch.randint(low, high, (rows, columns), generator=draw)
    scales = torch.rand(rows, -(-columns // group), generator=draw) * scale
    values = nibbles(whole[kept]) if kind == "int4" else whole[kept].to(torch.int8)
    spread = scales.double().repeat_interleave(group, 1)[:, :columns]
    return whole * kept * spread, Matrix(columns, mask, values, scales, group)


def rounded(x, group):
    """Vectors (n, columns) in fp64, rounded to 16-bit integers with a scale for each group."""
    columns = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -columns % group)).view(len(x), -1, group)
    most = padded.abs().amax(2, keepdim=True)
    whole = (padded * (32512 / most).where(most > 0, 0)).round()
    return (whole.double() * (most / 32512).double()).view(len(x), -1)[:, :columns]


KINDS = st.sampled_from([*FLOATS, "int8", "int4"])
SHARES = st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.95, 1.0])


@pytest.mark.parametrize("level", HERE)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 300), batch=st.integers(1, 9), share=SHARES,
    kind=KINDS, half=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_product_equals_that_of_the_dense_matrix(
    level, rows, columns, batch, share, kind, half, seed
):
    dense, matrix = packed(rows, columns, share, kind, seed)
    matrix.use(level)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed + 1))
    x = x.bfloat16() if half else x
    expected = x.double() @ dense.T
    # Rounding of sums in fp32, relative to the sum of the absolute products.
    bound = x.double().abs() @ dense.abs().T * 2e-6 + 1e-30
    if level == "avx512-bf16" and kind in ("int8", "int4"):
        # x is rounded to 16 bits of its largest magnitude in a group of columns.
        grouped = torch.nn.functional.pad(x.double().abs(), (0, -columns % GROUP))
        most = grouped.view(batch, -1, GROUP).amax(2).repeat_interleave(GROUP, 1)[:, :columns]
        bound += most @ dense.abs().T / 65024 * 1.01
    assert ((matrix.product(x) - expected).abs() <= bound).all()


@pytest.mark.parametrize("level", HERE)
@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 1100), batch=st.integers(1, 9), share=SHARES,
    kind=st.sampled_from(["int8", "int4"]), group=st.sampled_from([64, 128, 192, 256, 320, 1152]),
    pattern=st.sampled_from(["", "same", "empty"]), seed=st.integers(0, 2**16),
)  # fmt: skip
@example(  # the last columns of all rows are removed
    rows=2, columns=2, batch=1, share=0.3, kind="int8", group=64, pattern="same", seed=1
)
def test_sums_of_integers_in_a_group_are_exact(
    level, rows, columns, batch, share, kind, group, pattern, seed
):
    dense, matrix = packed(rows, columns, share, kind, seed, group, pattern)
    matrix.use(level)
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, columns, generator=draw) * 10 ** torch.randn(1, columns, generator=draw)
    given = rounded(x, group) if level == "avx512-bf16" else x.double()
    found, expected = matrix.product(x), given @ dense.T
    # Only the sums over groups are rounded, relative to the sum of the absolute products.
    bound = given.abs() @ dense.abs().T * 2e-6 + 1e-30
    if level == "avx512-bf16":  # a value half way between two integers may be rounded to the other
        padded = torch.nn.functional.pad(x.double().abs(), (0, -columns % group))
        most = padded.view(batch, -1, group).amax(2).repeat_interleave(group, 1)[:, :columns]
        bound += (most.unsqueeze(1) / 32512 * dense.abs()).amax(2)
    assert ((found - expected).abs() <= bound).all()
    assert torch.equal(matrix.expand(0, rows), dense.float())


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_groups_of_numbers_near_zero_are_multiplied(level, kind):
    dense, matrix = packed(5, 300, 0.5, kind, 3)
    matrix.use(level)
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(4))
    x[0, :128] *= 1e-37  # 32512 divided by these is not finite
    x[1] = 0
    found, expected = matrix.product(x), x.double() @ dense.T
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-2)
    assert not found[1].any()
    x = x[:1, :] * 0 + 1e-37
    found, expected = matrix.product(x).double(), x.double() @ dense.T
    assert ((found - expected).abs() <= 1e-4 * x.double() @ dense.abs().T).all()


@pytest.mark.parametrize("level", HERE)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 300), share=SHARES, kind=KINDS,
    seed=st.integers(0, 2**16), data=st.data(),
)  # fmt: skip
def test_rows_are_expanded_exactly(level, rows, columns, share, kind, seed, data):
    dense, matrix = packed(rows, columns, share, kind, seed)
    matrix.use(level)
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    assert torch.equal(matrix.expand(first, last), dense[first:last].float())
    half = matrix.expand(first, last, torch.bfloat16)
    assert torch.equal(half, dense[first:last].float().bfloat16())


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_subnormal_scales_are_expanded_exactly(level, kind):
    dense, matrix = packed(7, 300, 0.5, kind, 5, scale=1e-38)
    matrix.use(level)
    assert torch.equal(matrix.expand(0, 7), dense.float())
    assert torch.equal(matrix.expand(0, 7, torch.bfloat16), dense.float().bfloat16())


@pytest.mark.parametrize("level", HERE)
def test_every_number_of_16_bits_is_widened_exactly(level):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for kind in (torch.bfloat16, torch.float16):
        values = bits.view(kind).view(256, 256)
        kept = torch.ones(256, 256, dtype=torch.bool)
        matrix = Matrix(256, bitmask(kept), values.reshape(-1))
        matrix.use(level)
        wide = matrix.expand(0, 256)
        expected = values.float()
        assert torch.equal(wide.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(wide[finite], expected[finite])
        assert torch.equal(wide[finite].signbit(), expected[finite].signbit())


@pytest.mark.parametrize("kind", [torch.bfloat16, "int8", "int4"])
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_result(level, kind, value):
    dense, matrix = packed(5, 200, 0.0, kind, 3)
    matrix.use(level)
    x = torch.ones(2, 200)
    x[1, 150] = value
    found, expected = matrix.product(x), x.double() @ dense.T
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()
    assert torch.equal(found[1].isnan(), expected[1].isnan())


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 300), columns=st.integers(1, 300), batch=st.integers(0, 200), share=SHARES,
    kind=KINDS, seed=st.integers(0, 2**16),
)  # fmt: skip
def test_products_with_many_vectors_equal_those_of_the_dense_matrix(
    rows, columns, batch, share, kind, seed
):
    dense, matrix = packed(rows, columns, share, kind, seed)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    found = matrix.tiled(x)
    if LEVEL != "avx512-bf16":
        assert found is None
        return
    expected = x.double() @ dense.T
    size = x.double().abs() @ dense.abs().T
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= 2**-7 * size + 1e-30).all()


@pytest.mark.skipif(LEVEL != "avx512-bf16", reason="no product in tiles here")
@pytest.mark.parametrize(("rows", "columns"), [(700, 2000), (130, 20000), (5, 70000)])
def test_large_matrices_are_multiplied_in_tiles(rows, columns):
    dense, matrix = packed(rows, columns, 0.5, torch.bfloat16, 3)
    x = torch.randn(13, columns).bfloat16()
    expected = x.double() @ dense.T
    assert ((matrix.tiled(x) - expected).abs() / expected.abs().max()).max() < 1e-2
    assert matrix.tiled(x.float()) is None
    matrix.use("avx2")
    assert matrix.tiled(x) is None


@pytest.fixture(params=["torch's", "own"])
def kind_of_threads(request):
    """The threads of products: those of torch's OpenMP, or those of the library itself."""
    if (team := library.torch_openmp()) is None and request.param == "torch's":
        pytest.skip("torch has no OpenMP here")
    library.LIBRARY.apt_use_openmp(team if request.param == "torch's" else None)
    yield
    library.LIBRARY.apt_use_openmp(team)


@pytest.mark.skipif(library.torch_openmp() is None, reason="torch has no OpenMP here")
def test_products_start_no_threads_of_their_own():
    script = """
from pathlib import Path
import torch
from apt_kernels import DenseMatrix
def threads(): return len(list(Path("/proc/self/task").iterdir()))
torch.set_num_threads(2)
weight = torch.randn(4096, 4096)
weight[:64] @ weight
before, x = threads(), torch.randn(1, 4096)
expected = DenseMatrix(weight).product(x)
print(threads() - before, torch.allclose(expected, x @ weight.T, rtol=1e-3, atol=1e-2))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "True"], done.stdout + done.stderr


@pytest.mark.usefixtures("kind_of_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_does_not_change_the_result(threads):
    dense, matrix = packed(3000, 512, 0.6, torch.bfloat16, 0)
    x, before = torch.randn(2, 512), torch.get_num_threads()
    one, many = matrix.product(x), matrix.tiled(x.bfloat16())
    try:
        torch.set_num_threads(threads)
        for _ in range(50):
            assert torch.equal(matrix.product(x), one)
            if many is not None:
                assert torch.equal(matrix.tiled(x.bfloat16()), many)
            assert torch.equal(matrix.expand(5, 2990), dense[5:2990].float())
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("kind_of_threads")
def test_several_threads_can_multiply_at_the_same_time():
    _, matrix = packed(2000, 512, 0.6, torch.bfloat16, 1)
    vectors = [torch.randn(1, 512) for _ in range(4)]
    expected = [matrix.product(x) for x in vectors]
    wrong = []

    def work(index):
        for _ in range(100):
            if not torch.equal(matrix.product(vectors[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.usefixtures("kind_of_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_has_its_own_threads():
    _, matrix = packed(3000, 512, 0.6, torch.bfloat16, 2)
    x, before = torch.randn(1, 512), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = matrix.product(x)
        if not (child := os.fork()):
            os._exit(0 if torch.equal(matrix.product(x), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_process_forked_before_the_first_product_has_its_own_threads():
    script = """
import os, signal, torch
from apt_kernels import DenseMatrix
torch.set_num_threads(2)
weight, x = torch.randn(2048, 2048), torch.randn(1, 2048)
weight @ weight  # its threads do not exist in the child
matrix = DenseMatrix(weight)
if not (child := os.fork()):
    signal.alarm(20)
    matrix.product(x)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["0"], done.stdout + done.stderr


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("columns", [128 * 64, 200 * 64])
@pytest.mark.parametrize("value", [-128, 127, -8, 7])
@pytest.mark.parametrize("given", [1.0, -1.0])
def test_largest_integers_of_a_wide_group_are_summed_exactly(level, columns, value, given):
    values = torch.full((columns,), value, dtype=torch.int8)
    kept = torch.ones(1, columns, dtype=torch.bool)
    stored = [values] if abs(value) > 8 else [values, nibbles(values)]
    for numbers in stored:
        matrix = Matrix(columns, bitmask(kept), numbers, torch.ones(1, 1), columns)
        matrix.use(level)
        found = matrix.product(torch.full((1, columns), given))
        assert torch.allclose(found, torch.tensor([[given * value * columns]]))


@pytest.mark.skipif(
    SANITIZED or not (which("aarch64-linux-gnu-g++") and which("qemu-aarch64")),
    reason="needs a cross compiler and an emulator: g++-aarch64-linux-gnu, qemu-user",
)
def test_products_for_arm_equal_those_in_plain_cpp():
    script = Path(__file__).parents[3] / ".ci/neon"
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "765 cases, 0 wrong" in done.stdout


@pytest.mark.parametrize("level", HERE)
@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 70),
    words=st.integers(1, 9),
    kind=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    batch=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_dense_matrix_uses_the_memory_of_the_tensor(level, rows, words, kind, batch, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64 * words, generator=draw).to(kind)
    matrix = DenseMatrix(weight)
    matrix.use(level)
    x = torch.randn(batch, 64 * words, generator=draw).to(kind)
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    assert ((matrix.product(x) - expected).abs() / size).max() < 1e-3
    assert torch.equal(matrix.expand(0, rows), weight.float())
    weight.mul_(2)  # the last rows as well
    assert torch.equal(matrix.product(x), 2 * matrix_of(weight / 2, level).product(x))
    for wrong in (weight[:, :-1], weight.t().contiguous().t(), weight.int(), weight.double(),
                  weight.to("meta")):  # fmt: skip
        if wrong.shape[1] % 64 or not wrong.is_contiguous() or wrong.dtype != kind or wrong.is_meta:
            with pytest.raises(ValueError, match="a matrix of"):
                DenseMatrix(wrong)


def matrix_of(weight, level):
    matrix = DenseMatrix(weight)
    matrix.use(level)
    return matrix


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)
def test_copies_share_a_region_without_overlap(sizes, dtype):
    given = [torch.arange(size).to(dtype) for size in sizes]
    copies = [in_large_pages(values) for values in given]
    for values, copy in zip(given, copies, strict=True):
        assert torch.equal(copy, values)
        assert copy.data_ptr() != values.data_ptr() or not len(values)
        copy.zero_()
    assert all(torch.equal(values, torch.arange(len(values)).to(dtype)) for values in given)
    again = [in_large_pages(values.view(1, -1)) for values in given]
    assert all(torch.equal(copy[0], values) for copy, values in zip(again, given, strict=True))
    assert not any(copy.any() for copy in copies)


def test_threads_get_separate_memory():
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda n: in_large_pages(torch.full((64,), n)), range(2000)))
    assert all((copy == number).all() for number, copy in enumerate(copies))


@pytest.mark.skipif(
    SANITIZED or not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are those of Linux"
)
def test_region_is_released_with_its_last_tensor():
    def mapped(place):
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        return any(first <= place < last for first, last in ranges)

    large = in_large_pages(torch.ones(2**26 + 1, dtype=torch.uint8))  # a region of its own
    first, place = large[:1], large.data_ptr()
    del large
    assert mapped(place)
    del first
    assert not mapped(place)


def test_tensors_that_do_not_fit_are_refused():
    kept = torch.rand(4, 100) < 0.5
    values = torch.randn(int(kept.sum()))
    scales = torch.rand(4, 1)
    whole = torch.zeros(len(values), dtype=torch.int8)
    for arguments in [
        (100, bitmask(kept), values[:-1]),
        (108, bitmask(kept), values),
        (100, bitmask(kept), values.double()),
        (100, bitmask(kept), whole),
        (100, bitmask(kept), whole, scales, 100),
        (100, bitmask(kept), whole, scales[:3], 128),
        (100, bitmask(kept), whole.to(torch.uint8), scales, 128),
        (100, bitmask(kept).int(), values),
        (100, bitmask(kept), values.to("meta")),
    ]:
        with pytest.raises(ValueError, match=r"."):
            Matrix(*arguments)
    matrix = Matrix(100, bitmask(kept), values)
    with pytest.raises(ValueError, match="rows 3 to 9 of 4"):
        matrix.expand(3, 9)
    for x in (torch.randn(2, 99), torch.randn(100), torch.randn(1, 2, 100), torch.randn(2, 0),
              torch.randn(2, 100, device="meta")):  # fmt: skip
        for multiply in (matrix.product, matrix.tiled):
            with pytest.raises(ValueError, match="vectors of shape"):
                multiply(x.bfloat16())


def in_files():
    """The bytes of files that are in the memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssFile:")[1].split()[0])


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are those of Linux")
def test_copied_file_is_unmapped(tmp_path):
    size = 2**25
    (tmp_path / "values").write_bytes(bytes(range(256)) * (size // 256))
    values = torch.from_file(str(tmp_path / "values"), False, size, dtype=torch.uint8)
    total, before = int(values.sum()), in_files()
    copy = in_large_pages(values[100:-100])
    assert in_files() < before - size // 2
    assert torch.equal(copy, values[100:-100])  # which is read again
    assert int(values.sum()) == total
    plain = torch.arange(size // 8)
    assert torch.equal(in_large_pages(plain), plain)


@pytest.mark.parametrize("level", [*library.SERVED, "avx1"])
def test_instruction_set_from_environment(level, monkeypatch):
    monkeypatch.setenv("APT_KERNELS_LEVEL", level)
    if level in library.SERVED:
        assert library._chosen() == level
        return
    with pytest.raises(
        ValueError, match="APT_KERNELS_LEVEL is 'avx1'; this processor has portable"
    ):
        library._chosen()
