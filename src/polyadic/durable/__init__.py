"""Files and jobs that outlast a killed process, a full disk and a flipped bit."""
