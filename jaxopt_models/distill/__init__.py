"""Distillation: losses on arrays, and training of students by teachers as `(init, step)`."""

from ._adversarial import fool_loss as fool_loss
from ._adversarial import gradient_penalty as gradient_penalty
from ._adversarial import judge_accuracy as judge_accuracy
from ._adversarial import judge_loss as judge_loss
from ._datafree import activation as activation
from ._datafree import adversarial_js as adversarial_js
from ._datafree import disagreement as disagreement
from ._datafree import information_entropy as information_entropy
from ._datafree import one_hot as one_hot
from ._inversion import Inversions as Inversions
from ._inversion import batchnorm_statistics as batchnorm_statistics
from ._inversion import total_variation as total_variation
from ._judges import judge as judge
from ._judges import judged as judged
from ._sequences import attention_relation as attention_relation
from ._sequences import self_relation as self_relation
from ._sequences import sequence as sequence
from ._speech import ctc_frames as ctc_frames
from ._speech import ctc_sequence as ctc_sequence
from ._speech import transducer as transducer
from ._towers import affinity as affinity
from ._towers import cross_modal as cross_modal
from ._towers import image_text as image_text
from ._video import align_frames as align_frames
from ._video import motion as motion
