"""Is this genuine hardware in a good state, running this code, holding this key?

*format* (bytes <-> frozen types) -> *verify* (is it authentic) -> *appraise* (do we want it) -> `edge` (fetch, collect).
Everything outside `edge` is a pure function of its arguments; `now` is always one of them.
"""
