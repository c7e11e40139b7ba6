"""The shared words: configuration, data layout, records, seeding, metrics, cohort kernel. Imports nothing of ours."""
