"""NVIDIA GPUs and NVSwitches: SPDM measurement reports, judged by the vendor's signed reference manifests (RIM).

*format* reads reports, *device* reads what the device's certificates say, *rim* reads manifests, *verify* decides, *roots* are
data. *eat* reads what NVIDIA's own attestation service says about a device, for those who name that service as an authority.
"""
