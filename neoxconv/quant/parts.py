"""Kernels that only kernels call: each is read and typed once, and becomes machine code inside those that call it.

numba by itself optimizes a kernel with all that it calls and makes machine code of it, then does the same again for
every kernel that calls it: what lies three calls deep was made four times. That was about half of what compiling
took. Here the last steps are left out, and the optimizer sees a part once for each kernel that is called from Python.
Each part is still simplified on its own first; without that the searches took 1.2 to 1.4 times as long.

See "Customizing the Compiler" in numba's documentation for the pipeline. Tried with numba 0.61.0 and 0.68.1.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _Linked(JITCodeLibrary):
    """Code that is linked into that of its callers, and is neither optimized with what it calls nor run by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    """Makes LLVM's code of a part, for its callers only."""

    _name = "neoxconv_part_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower `state`'s function into a library of ours, and let callers know of it."""
        state.library = _Linked(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = state.flags.no_cpython_wrapper = state.flags.no_cfunc_wrapper = True
        super().run_pass(state)
        # The dispatcher wants a builtin to call from Python; no arguments of a part's are right for this one.
        entry = (f"{state.func_id.func_qualname} is a part: only kernels call it",).index
        state.targetctx.insert_user_function(entry, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=entry)
        return True


class PartCompiler(CompilerBase):
    """numba's compiler with that pass in place of its own."""

    def define_pipelines(self) -> list[Any]:
        """One pipeline, numba's usual one but for that."""
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [
            (_Lowering, text) if each is NativeLowering else (each, text) for each, text in pipeline.passes
        ]
        pipeline.finalize()
        return [pipeline]
