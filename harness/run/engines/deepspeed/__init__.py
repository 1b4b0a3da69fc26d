"""DeepSpeed's pipeline engine; nothing else imports deepspeed."""
