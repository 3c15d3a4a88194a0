"""The fast backend: a teacher inside vLLM (DESIGN §7).

Two halves. The client (`client`) has the interface of every backend and runs in the capture's process. The plug-in is
what vLLM loads into its own processes through the entry-point group `vllm.general_plugins`: models whose attention
follows a diffusion layout (`models`, `attention`), a pooler that applies the head to scored rows only (`pooler`), and a
scheduler that knows which pages of a prompt may be reused (`scheduler`). Both halves agree on `pages`: how a request is
laid out in the pages of vLLM's key/value cache. Written for vLLM 0.32.
"""
