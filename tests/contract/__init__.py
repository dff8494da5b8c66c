"""The drop-in contract: each test is named after its point; docs/contract.md is the table of them."""
