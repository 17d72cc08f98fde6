"""Sources → prompts → tokens → streams: what goes in, row by row."""
