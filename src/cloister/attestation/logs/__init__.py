"""Logs that explain registers: firmware's (TCG2, CCEL) and the kernel's (IMA). Bytes in, frozen types out; nothing is believed
before its replay equals a register that hardware signed.
"""
