"""The conformance kit on the engine's own rules, on faulty ones, and on a third party's."""
