"""What a rank needs, imported in the least time. Importing this module is all that there is to it: a fork server, which
imports by name, does so once for the ranks that it starts.

The collector of cycles would look again and again at what is there to stay, for about a seventh of the time that NeMo
takes. What has been imported is then taken out of its sight, so that it neither slows a rank down nor has it copy
pages that forked processes share (Python's documentation of ``gc.freeze``).
"""

import gc

gc.disable()

from nemo_qwen_hidden import running  # noqa: E402, F401
from nemo_qwen_hidden.model import hidden_model  # noqa: E402, F401
from nemo_qwen_hidden.store.write import writer  # noqa: E402, F401

gc.enable()
gc.freeze()
