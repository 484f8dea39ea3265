"""Where code of the shells computes with tensors: a reading of their source by the annotations they have."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import difusores

PACKAGE = Path(difusores.__file__).parent
SHELLS = PACKAGE / "schedulers"

# What a shell may ask of torch: to hold numbers, to name types and devices.
OF_TORCH = frozenset(
    [
        "Generator",
        "Size",
        "Tensor",
        "arange",
        "as_tensor",
        "bool",
        "broadcast_shapes",
        "compiler",
        "device",
        "dtype",
        "empty",
        "empty_like",
        "equal",
        "finfo",
        "float",
        "float16",
        "float32",
        "float64",
        "from_numpy",
        "full",
        "inference_mode",
        "int32",
        "int64",
        "linspace",
        "long",
        "no_grad",
        "promote_types",
        "tensor",
    ]
)
# What it may ask of a tensor: its numbers where they are, in another dtype, order, shape or place.
OF_A_TENSOR = frozenset(
    [
        "chunk",
        "clone",
        "contiguous",
        "copy_",
        "cpu",
        "data_ptr",
        "detach",
        "double",
        "element_size",
        "expand",
        "flatten",
        "flip",
        "float",
        "is_floating_point",
        "is_inference",
        "numel",
        "numpy",
        "reshape",
        "resolve_neg",
        "split",
        "stride",
        "to",
        "tolist",
        "unbind",
    ]
)
# Of these, what is no tensor; and the attributes of one that are tensors.
NUMBERS = frozenset(
    [
        "data_ptr",
        "element_size",
        "is_floating_point",
        "is_inference",
        "numel",
        "numpy",
        "stride",
        "tolist",
    ]
)
VIEWS = frozenset({"T", "mT", "H", "data", "grad", "real", "imag"})
PLAIN = frozenset({"bool", "divmod", "float", "hasattr", "int", "isinstance", "len", "range", "str", "type"})


def _annotated(note: ast.expr | None) -> bool | None:
    """Whether an annotation lets a tensor be there; None where there is none."""
    if note is None:
        return None
    text = ast.unparse(note)
    return "Tensor" in text.replace("TensorS", "") or text == "Any"


@cache
def returns() -> dict[str, bool]:
    """Of every function of the package that a shell may call, by name: whether it may return a tensor."""
    found: dict[str, bool] = {}
    below = [PACKAGE / f"{name}.py" for name in ("brownian", "plan", "sampling", "schedules")]
    for file in (*SHELLS.glob("*.py"), *(PACKAGE / "solvers").glob("*.py"), *below):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found[node.name] = found.get(node.name, False) or bool(_annotated(node.returns))
    return found


@cache
def kept() -> frozenset[str]:
    """Attributes of the shells that may be tensors: those annotated so, and those that are given some."""
    found: set[str] = set()
    for file in SHELLS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("Tensor"):
                found.add(ast.unparse(node.target))
    return frozenset(found | {"alphas", "betas", "final_alpha_cumprod", "initial_alpha_cumprod"})


class Reader(ast.NodeVisitor):
    """Follows tensors through the functions of one file, and notes what is computed with them."""

    def __init__(self, returns: dict[str, bool], kept: frozenset[str]) -> None:
        self.returns, self.kept = returns, kept
        self.tensors: set[str] = set()
        self.found: list[tuple[int, str]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = set(self.tensors)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            (self.tensors.add if _annotated(argument.annotation) else self.tensors.discard)(argument.arg)
        for statement in node.body:
            self.visit(statement)
        self.tensors = before

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for part in node.generators:
            self.visit(part.iter)
            self._bind([part.target], self.is_tensor(part.iter))
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def visit_For(self, node: ast.For) -> None:
        self._bind([node.target], self.is_tensor(node.iter))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    self._bind([one], self.is_tensor(value))
            else:
                self._bind([target], self.is_tensor(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._bind([node.target], bool(_annotated(node.annotation)))
        self.generic_visit(node)

    def _bind(self, targets: Iterable[ast.expr], tensor: bool) -> None:
        for target in targets:
            match target:
                case ast.Name(id=name):
                    (self.tensors.add if tensor else self.tensors.discard)(name)
                case ast.Tuple(elts=parts) | ast.List(elts=parts):
                    self._bind(parts, tensor)
                case ast.Starred(value=value):
                    self._bind([value], tensor)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._operands(node, node.target, node.value)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._operands(node, node.left, node.right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.Not):
            self._operands(node, node.operand)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in node.ops):
            self._operands(node, node.left, *node.comparators)
        self.generic_visit(node)

    def _operands(self, node: ast.stmt | ast.expr, *operands: ast.expr) -> None:
        if any(map(self.is_tensor, operands)):
            self.found.append((node.lineno, ast.unparse(node)))

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("abs", "max", "min", "pow", "sum"):
            self._operands(node, *node.args)
        elif (
            isinstance(function, ast.Attribute)
            and function.attr not in OF_A_TENSOR
            and self.is_tensor(function.value)
        ):
            self.found.append((node.lineno, ast.unparse(node)))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr not in OF_TORCH:
            self.found.append((node.lineno, ast.unparse(node)))
        self.generic_visit(node)

    def is_tensor(self, node: ast.expr) -> bool:
        """Whether an expression may be a tensor, or hold some."""
        match node:
            case ast.Name(id=name):
                return name in self.tensors
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return name in self.kept
            case ast.Attribute(value=value, attr=name):
                return name in VIEWS and self.is_tensor(value)
            case ast.Subscript(value=value) | ast.Starred(value=value) | ast.NamedExpr(value=value):
                return self.is_tensor(value)
            case ast.BinOp(left=left, right=right):
                return self.is_tensor(left) or self.is_tensor(right)
            case ast.UnaryOp(operand=operand):
                return self.is_tensor(operand)
            case ast.IfExp(body=body, orelse=other):
                return self.is_tensor(body) or self.is_tensor(other)
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return any(map(self.is_tensor, parts))
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return self.is_tensor(element)
            case ast.Call():
                return self._call_is_tensor(node)
        return False

    def _call_is_tensor(self, node: ast.Call) -> bool:
        function = node.func
        if isinstance(function, ast.Attribute):
            if isinstance(function.value, ast.Name) and function.value.id == "torch":
                return function.attr not in (
                    "Size",
                    "device",
                    "finfo",
                    "broadcast_shapes",
                    "promote_types",
                    "equal",
                )
            if self.is_tensor(function.value):
                return function.attr not in NUMBERS
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in PLAIN:
            return False
        return self.returns.get(name, any(map(self.is_tensor, node.args)))


def computed(source: str) -> list[tuple[int, str]]:
    """(line, expression) of everything in a shell's source that computes with tensors."""
    reader = Reader(returns(), kept())
    reader.visit(ast.parse(source))
    return reader.found
