"""The HTTP API: form fields, routes and error responses; `vilseg.api_schema` defines the JSON."""
