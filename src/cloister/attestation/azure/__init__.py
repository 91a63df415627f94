"""What `azure_snp` and `azure_tdx` share: the HCL report of Azure's confidential VMs, and the vTPM that it vouches for."""
