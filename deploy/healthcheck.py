"""The image's health check: exit code 0 if the server on MEMORYLLM_PORT answers /ready with 200, else 1.

No part of the project is imported, so that it costs little, and no proxy of the environment is asked.
"""

import http.client
import os
import sys

PORT = int(os.environ.get("MEMORYLLM_PORT") or 8000)


def main() -> int:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=4)
    try:
        connection.request("GET", "/ready")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    finally:
        connection.close()
    print(f"/ready answers {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
