"""From a config to a result: opening models, walking the stages, compiling, planning, running."""
