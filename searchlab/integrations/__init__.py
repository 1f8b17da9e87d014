"""Our spaces and evaluators under the algorithms of other libraries."""
