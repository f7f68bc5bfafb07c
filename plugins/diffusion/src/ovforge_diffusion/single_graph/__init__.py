"""A whole text-to-image pipeline as one OpenVINO graph: text in, pictures out, for programs without Python.

`sampler` makes tables of any linear sampling method, `texts` and `conditions` read prompts inside the graph,
`denoising` loops over the steps, `decoding` makes pictures; `export` joins them, `folder` and `command` write them.
"""
