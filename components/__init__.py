"""The parts: no command line, no cluster start. `pipelines` builds on them, never the other way round."""
