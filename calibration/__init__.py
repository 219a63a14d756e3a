"""What calibrate.py, predict.py and monitor.py stand on: thresholds, what they promise, and where they no
longer do.

Read operating_point.py (thresholds on validation, figures on both sides), intervals.py, ensemble.py, site.py
(another hospital), shift.py and shares.py (unlike validation?), sequential.py (tests at all times),
wording.py and show.py (what is said of a calibration). The thresholds themselves are chosen in metrics.py.
"""
