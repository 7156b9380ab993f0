"""Byte formats: a file or a folder each, which know names and bytes, not models.

Readers: `index(path)` gives what a source holds, as an Index. Writers: `layout(...)` gives the files of a target, as
FileLayouts (`layout_pt` of a .pt file). In between stand LazyTensors that read their rows when asked.
"""
