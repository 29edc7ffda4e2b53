"""Load tests with locust: `make loadtest SCENARIO=steady`, or `locust -f loadtests/locust/locustfile.py --host URL`."""
