"""The papers behind what this project implements, by key. Authors beyond the fourth are ``others``.

Entries with an ``arxiv`` number are found by it in the docstrings of algorithms, adaptation methods and data sets.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One entry.

    Attributes:
        key: of the BibTeX entry.
        authors: in BibTeX's form.
        title: with braces where capitals matter.
        year: of publication.
        venue: conference or journal; empty for a preprint.
        arxiv: number, or empty.
        kind: BibTeX type.
    """

    key: str
    authors: str
    title: str
    year: int
    venue: str = ""
    arxiv: str = ""
    kind: str = "inproceedings"

    def bibtex(self) -> str:
        """A BibTeX entry."""
        where = {"article": "journal", "inproceedings": "booktitle", "book": "publisher"}.get(self.kind, "howpublished")
        fields = {"title": self.title, "author": self.authors, where: self.venue, "year": str(self.year)}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{self.kind}{{{self.key},", *lines, "}"])

    def plain(self) -> str:
        """One line."""
        names = [_spoken(name) for name in self.authors.split(" and ") if name]
        who = names[0] if len(names) == 1 else ", ".join(names[:-1])
        if len(names) > 1:
            who += " et al" if names[-1] == "others" else f" and {names[-1]}"
        where = [self.venue, f"arXiv {self.arxiv}" if self.arxiv else "", str(self.year)]
        title = self.title.replace("{", "").replace("}", "")
        return f"{f'{who}. ' if who else ''}{title}. {', '.join(part for part in where if part)}."


def _spoken(name: str) -> str:
    """``Li, Bo`` -> ``Bo Li``."""
    last, comma, first = name.replace("{\\'e}", "é").partition(", ")
    return f"{first} {last}" if comma else name


_MNIST = Paper(
    "lecun1998mnist",
    "LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick",
    "Gradient-based learning applied to document recognition",
    1998,
    "Proceedings of the IEEE",
    kind="article",
)
PAPERS = (
    # methods
    Paper(
        "zhong2022metadmoe",
        "Zhong, Tao and Chi, Zhixiang and Gu, Li and Wang, Yang and others",
        "{Meta-DMoE}: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts",
        2022,
        "Advances in Neural Information Processing Systems",
        "2210.03885",
    ),
    Paper(
        "li2023gmoe",
        "Li, Bo and Shen, Yifei and Yang, Jingkang and Wang, Yezhen and others",
        "Sparse Mixture-of-Experts are Domain Generalizable Learners",
        2023,
        "International Conference on Learning Representations",
        "2206.04046",
    ),
    Paper(
        "qiu2024emoe",
        "Qiu, Zihan and Huang, Zeyu and Fu, Jie",
        "Unlocking Emergent Modularity in Large Language Models",
        2024,
        "North American Chapter of the Association for Computational Linguistics",
        "2310.10908",
    ),
    Paper(
        "lo2024m2mkd",
        "Lo, Ka Man and Liang, Yiming and Du, Wenyu and Fan, Yuantao and others",
        "{m2mKD}: Module-to-Module Knowledge Distillation for Modular Transformers",
        2024,
        "",
        "2402.16918",
        "misc",
    ),
    Paper(
        "zhu2024jetpack",
        "Zhu, Xingkui and Guan, Yiran and Liang, Dingkang and Chen, Yuchao and others",
        "{MoE Jetpack}: From Dense Checkpoints to Adaptive Mixture of Experts for Vision Tasks",
        2024,
        "Advances in Neural Information Processing Systems",
        "2406.04801",
    ),
    Paper("vapnik1998", "Vapnik, Vladimir N.", "Statistical Learning Theory", 1998, "Wiley", kind="book"),
    Paper(
        "shi2022fish",
        "Shi, Yuge and Seely, Jeffrey and Torr, Philip H. S. and Siddharth, N. and others",
        "Gradient Matching for Domain Generalization",
        2022,
        "International Conference on Learning Representations",
        "2104.09937",
    ),
    Paper(
        "arjovsky2019irm",
        "Arjovsky, Martin and Bottou, L{\\'e}on and Gulrajani, Ishaan and Lopez-Paz, David",
        "Invariant Risk Minimization",
        2019,
        "",
        "1907.02893",
        "misc",
    ),
    Paper(
        "sun2016coral",
        "Sun, Baochen and Saenko, Kate",
        "Deep {CORAL}: Correlation Alignment for Deep Domain Adaptation",
        2016,
        "ECCV Workshops",
        "1607.01719",
    ),
    Paper(
        "arpit2022sma",
        "Arpit, Devansh and Wang, Huan and Zhou, Yingbo and Xiong, Caiming",
        "Ensemble of Averages: Improving Model Selection and Boosting Performance in Domain Generalization",
        2022,
        "Advances in Neural Information Processing Systems",
        "2110.10832",
    ),
    Paper(
        "cha2021swad",
        "Cha, Junbum and Chun, Sanghyuk and Lee, Kyungjae and Cho, Han-Cheol and others",
        "{SWAD}: Domain Generalization by Seeking Flat Minima",
        2021,
        "Advances in Neural Information Processing Systems",
        "2102.08604",
    ),
    Paper(
        "riquelme2021vmoe",
        "Riquelme, Carlos and Puigcerver, Joan and Mustafa, Basil and Neumann, Maxim and others",
        "Scaling Vision with Sparse Mixture of Experts",
        2021,
        "Advances in Neural Information Processing Systems",
        "2106.05974",
    ),
    Paper(
        "gulrajani2021domainbed",
        "Gulrajani, Ishaan and Lopez-Paz, David",
        "In Search of Lost Domain Generalization",
        2021,
        "International Conference on Learning Representations",
        "2007.01434",
    ),
    # test-time adaptation
    Paper(
        "schneider2020bn",
        "Schneider, Steffen and Rusak, Evgenia and Eck, Luisa and Bringmann, Oliver and others",
        "Improving Robustness against Common Corruptions by Covariate Shift Adaptation",
        2020,
        "Advances in Neural Information Processing Systems",
        "2006.16971",
    ),
    Paper(
        "li2016adabn",
        "Li, Yanghao and Wang, Naiyan and Shi, Jianping and Liu, Jiaying and others",
        "Revisiting Batch Normalization for Practical Domain Adaptation",
        2016,
        "",
        "1603.04779",
        "misc",
    ),
    Paper(
        "wang2021tent",
        "Wang, Dequan and Shelhamer, Evan and Liu, Shaoteng and Olshausen, Bruno and others",
        "Tent: Fully Test-Time Adaptation by Entropy Minimization",
        2021,
        "International Conference on Learning Representations",
        "2006.10726",
    ),
    Paper(
        "niu2022eata",
        "Niu, Shuaicheng and Wu, Jiaxiang and Zhang, Yifan and Chen, Yaofo and others",
        "Efficient Test-Time Model Adaptation without Forgetting",
        2022,
        "International Conference on Machine Learning",
        "2204.02610",
    ),
    # backbones
    Paper(
        "dosovitskiy2021vit",
        "Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and others",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        2021,
        "International Conference on Learning Representations",
        "2010.11929",
    ),
    Paper(
        "oquab2024dinov2",
        "Oquab, Maxime and Darcet, Timoth{\\'e}e and Moutakanni, Th{\\'e}o and Vo, Huy and others",
        "{DINOv2}: Learning Robust Visual Features without Supervision",
        2024,
        "Transactions on Machine Learning Research",
        "2304.07193",
        "article",
    ),
    Paper(
        "touvron2021deit",
        "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and others",
        "Training Data-Efficient Image Transformers and Distillation through Attention",
        2021,
        "International Conference on Machine Learning",
        "2012.12877",
    ),
    Paper(
        "he2016resnet",
        "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
        "Deep Residual Learning for Image Recognition",
        2016,
        "IEEE Conference on Computer Vision and Pattern Recognition",
        "1512.03385",
    ),
    Paper(
        "huang2017densenet",
        "Huang, Gao and Liu, Zhuang and van der Maaten, Laurens and Weinberger, Kilian Q.",
        "Densely Connected Convolutional Networks",
        2017,
        "IEEE Conference on Computer Vision and Pattern Recognition",
        "1608.06993",
    ),
    Paper(
        "liu2022convnext",
        "Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and Feichtenhofer, Christoph and others",
        "A {ConvNet} for the 2020s",
        2022,
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        "2201.03545",
    ),
    Paper(
        "sandler2018mobilenetv2",
        "Sandler, Mark and Howard, Andrew and Zhu, Menglong and Zhmoginov, Andrey and others",
        "{MobileNetV2}: Inverted Residuals and Linear Bottlenecks",
        2018,
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        "1801.04381",
    ),
    Paper(
        "devlin2019bert",
        "Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina",
        "{BERT}: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        2019,
        "North American Chapter of the Association for Computational Linguistics",
        "1810.04805",
    ),
    Paper(
        "touvron2023llama",
        "Touvron, Hugo and Lavril, Thibaut and Izacard, Gautier and Martinet, Xavier and others",
        "{LLaMA}: Open and Efficient Foundation Language Models",
        2023,
        "",
        "2302.13971",
        "misc",
    ),
    # data
    _MNIST,
    Paper(
        "koh2021wilds",
        "Koh, Pang Wei and Sagawa, Shiori and Marklund, Henrik and Xie, Sang Michael and others",
        "{WILDS}: A Benchmark of in-the-Wild Distribution Shifts",
        2021,
        "International Conference on Machine Learning",
        "2012.07421",
    ),
    Paper(
        "zhang2021arm",
        "Zhang, Marvin and Marklund, Henrik and Dhawan, Nikita and Gupta, Abhishek and others",
        "Adaptive Risk Minimization: Learning to Adapt to Domain Shift",
        2021,
        "Advances in Neural Information Processing Systems",
        "2007.02931",
    ),
    Paper(
        "ganin2016dann",
        "Ganin, Yaroslav and Ustinova, Evgeniya and Ajakan, Hana and Germain, Pascal and others",
        "Domain-Adversarial Training of Neural Networks",
        2016,
        "Journal of Machine Learning Research",
        "1505.07818",
        "article",
    ),
    Paper(
        "alpaydin1998optdigits",
        "Alpaydin, Ethem and Kaynak, Cenk",
        "Optical Recognition of Handwritten Digits",
        1998,
        "UCI Machine Learning Repository",
        kind="misc",
    ),
    Paper("duin1998mfeat", "Duin, Robert", "Multiple Features", 1998, "UCI Machine Learning Repository", kind="misc"),
    Paper(
        "xiao2017fashion",
        "Xiao, Han and Rasul, Kashif and Vollgraf, Roland",
        "{Fashion-MNIST}: A Novel Image Dataset for Benchmarking Machine Learning Algorithms",
        2017,
        "",
        "1708.07747",
        "misc",
    ),
    Paper(
        "wang2019glue",
        "Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and others",
        "{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
        2019,
        "International Conference on Learning Representations",
        "1804.07461",
    ),
    Paper(
        "yang2023gluex",
        "Yang, Linyi and Zhang, Shuibai and Qin, Libo and Li, Yafu and others",
        "{GLUE-X}: Evaluating Natural Language Understanding Models from an Out-of-Distribution Generalization "
        "Perspective",
        2023,
        "Findings of the Association for Computational Linguistics",
        "2211.08073",
    ),
    Paper(
        "li2017pacs",
        "Li, Da and Yang, Yongxin and Song, Yi-Zhe and Hospedales, Timothy M.",
        "Deeper, Broader and Artier Domain Generalization",
        2017,
        "IEEE International Conference on Computer Vision",
        "1710.03077",
    ),
    Paper(
        "krizhevsky2009cifar",
        "Krizhevsky, Alex",
        "Learning Multiple Layers of Features from Tiny Images",
        2009,
        "University of Toronto",
        kind="misc",
    ),
)
BY_KEY = {paper.key: paper for paper in PAPERS}
BY_ARXIV = {paper.arxiv: paper for paper in PAPERS if paper.arxiv}
