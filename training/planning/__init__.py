"""Plans: phases, gates, execution and cost forecasts."""
