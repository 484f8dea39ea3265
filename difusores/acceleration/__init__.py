"""`accelerate` and `restore`: models of this package and of diffusers, faster on a CPU."""

from difusores.acceleration.engine import accelerate as accelerate
from difusores.acceleration.engine import calibrate as calibrate
from difusores.acceleration.engine import restore as restore
from difusores.acceleration.report import LayerReport as LayerReport
from difusores.acceleration.report import Report as Report
