"""What benchmarks share: cases, turns, results, and other libraries beside ours."""
