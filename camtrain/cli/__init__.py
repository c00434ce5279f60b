"""The command line: `camtrain fit | validate | test | explain | methods | layers`."""
