"""What an experiment would do and cost, told before anything is loaded, trained or written.

Rows are rendered and encoded as a run would; sizes follow from the LLM's configuration, operations from sizes and
tokens, times from operations and a speed. No weight is read.
"""

from fedproxy.forecast.comparison import forecast_comparison
from fedproxy.forecast.data_file import check_data
from fedproxy.forecast.diagnosis import diagnose
from fedproxy.forecast.run import forecast_run
from fedproxy.forecast.speed import Speed, given_speed, measure_speed

__all__ = ["Speed", "check_data", "diagnose", "forecast_comparison", "forecast_run", "given_speed", "measure_speed"]
