"""How is it started? The Hydra apps, sweeps, process trees and ports; no torch and no deepspeed."""
