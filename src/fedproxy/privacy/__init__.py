"""What a client's answers may tell about its rows: how it is bounded, accounted for, and put to the test."""
