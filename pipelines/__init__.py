"""What a user runs, in this order: finetune, unlearn, evaluate, promote."""
