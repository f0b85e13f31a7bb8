"""Scripts that make the tables in `docs/`; `benchmarks/README.md` lists them."""
