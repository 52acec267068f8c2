"""The forkserver's last import: do once what each forked process would do again.

inspect searches all modules for a frame's file, once per process (torchrun logs inspect.stack()).
torch's libraries unregister their operators when a process exits. Garbage collections traverse the
objects of all imported modules, and copy their memory pages.
"""

import atexit
import gc
import inspect
import weakref

inspect.getmodule(compile("", "<no file>", "exec"))
for entry in weakref.finalize._registry.values():  # type: ignore[attr-defined]
    if getattr(entry.func, "__module__", "").startswith("torch"):
        entry.atexit = False
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # else nanobind reports leaks when the forkserver exits
