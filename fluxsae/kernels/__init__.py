"""Triton kernels beside plain references. Every module here is public; none imports anything of ours."""
