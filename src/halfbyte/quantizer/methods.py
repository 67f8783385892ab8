"""How a matrix is put on the grid of its scheme: the calibrated methods, by name.

Each is a pure function of the weight, the Hessian of its inputs and the scheme; YAQA's of that of
its outputs, too, and GPTQ where there is none. Where a scheme has no integers to choose (plain
floats, tables), every method is a search.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.numerics.codec import encode
from halfbyte.numerics.grids import GRIDS
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer import gptq, signround, yaqa
from halfbyte.specs import Scheme, SolveMethod

Solve = Callable[[Tensor, Tensor, Scheme], QTensor]


def rtn(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QTensor:
    """Rounded to nearest, as the format's reference does."""
    return encode(weight, scheme)


def search(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QTensor:
    """The scales of least error, weighted by the mean square of every input channel."""
    return encode(weight, scheme, method="search", importance=hessian.diagonal())


SOLVES: dict[SolveMethod, Solve] = {
    "rtn": rtn,
    "search": search,
    "gptq": gptq.solve,
    "signround": signround.solve,
    "yaqa": gptq.solve,
    "awq": search,  # on channels that were scaled before (`fold`)
}


def solve(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    method: SolveMethod,
    *,
    outputs: Tensor | None = None,
) -> QTensor:
    """`weight` [N, K] by a method, for inputs with `hessian` [K, K] and gradients at the outputs
    with the second moment `outputs` [N, N]. Errors say `name`."""
    try:
        if scheme.name not in GRIDS:
            return (rtn if method == "rtn" else search)(weight, hessian, scheme)
        if outputs is not None:
            return yaqa.solve(weight, hessian, outputs, scheme)
        return SOLVES[method](weight, hessian, scheme)
    except HalfbyteError as error:
        raise type(error)(error.what, where=name, hint=error.hint) from error
