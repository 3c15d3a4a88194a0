"""Stage 1: run a large teacher once over a masked corpus and write its likelihoods to a cache. Never imports stage 2."""
