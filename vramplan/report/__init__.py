"""What a person looks at: reports on plans and runs."""
