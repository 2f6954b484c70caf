"""What each rank does when, in Chrome's trace event format: ``record`` takes it down, ``whole`` makes one file of all
ranks' records, ``shares`` sums it up. docs/profiling.md says what each span is."""
