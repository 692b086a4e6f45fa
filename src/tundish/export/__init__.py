"""Export: `.distcp` → Hugging Face folder, shard by shard; and its registration in MLflow."""
