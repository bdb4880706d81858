"""The papers' tables and figures as JSON files, one each; `common.json` holds the protocol that they share."""
