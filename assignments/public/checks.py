"""How the tests compare numbers: NaN is looked for first, then the shape, then the values."""

import torch


def same(got, want, why, tolerance=1e-5, dtype=None):
    """AssertionError with `why` unless a tensor has this shape and, within `tolerance` (of 1 or more), these values."""
    __tracebackhide__ = True  # the test's line is what matters
    want = torch.as_tensor(want, dtype=torch.float64)
    if not isinstance(got, torch.Tensor):
        raise AssertionError(f"{why} (there is {'nothing' if got is None else 'no tensor'} here)")
    if got.isnan().any():
        raise AssertionError(f"NaN came out: 0 * NaN and inf - inf are NaN, a masked cell may hold any of them ({why})")
    if got.shape != want.shape:
        raise AssertionError(f"{why} (the shape is {tuple(got.shape)}, it should be {tuple(want.shape)})")
    if dtype is not None and got.dtype != dtype:
        raise AssertionError(f"{why} (the type is {got.dtype}, it should be {dtype})")
    if not bool(((got.detach().double() - want).abs() <= tolerance * want.abs().clamp(min=1)).all()):
        raise AssertionError(why)
