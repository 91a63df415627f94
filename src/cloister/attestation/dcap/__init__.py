"""What SGX and TDX evidence share (Intel SGX/TDX DCAP): the quote's frame, the PCK certificate, collateral, and the judgement.

`format` bytes <-> frozen quote; `pck` what the PCK certificate says about a machine; `collateral` the vendor's documents;
`own` our check of every signature, window and chain; `qvl` the run of dcap-qvl, which must agree with `own`; `roots` pins.
No kind of evidence lives here: `sgx` and `tdx` are kinds, and each says what it takes (`format.Tee`).
"""
