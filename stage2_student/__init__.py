"""Stage 2: train, measure and use a small block-diffusion student from a cache. Never imports stage 1 or its teacher."""
