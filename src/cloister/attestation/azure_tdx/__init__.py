"""Azure confidential VMs on Intel TDX: a TD quote that vouches for a vTPM, whose quote is the evidence."""
