"""Quality and speed of TopK SAEs beside the peer libraries, on the same tokens in the same order.

`python -m benchmarks.peers --help`. The peers come with `pip install -e '.[bench]'`; one that is missing is skipped.
"""
