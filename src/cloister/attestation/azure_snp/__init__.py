"""Azure confidential VMs on AMD SEV-SNP: a hardware report that vouches for a vTPM, whose quote is the evidence."""
