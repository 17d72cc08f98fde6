"""One flat loop on the DeepSpeed engine, its batches and the original model's reference pass."""
