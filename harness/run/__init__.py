"""What happens in a rank? Data, engine, tracer and worker; the only place that imports deepspeed."""
