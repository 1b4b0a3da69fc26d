"""What happens in a rank? Tasks, the loop, data, engines and what watches them; torch."""
