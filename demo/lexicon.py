"""The words the demo model knows, English and Chinese; the first of each list is the usual one."""

COLOUR_EN = {
    "gray": ["gray", "grey"],
    "sky blue": ["sky blue", "light blue"],
    "navy": ["navy", "dark blue"],
    "mint": ["mint", "mint green"],
    "purple": ["purple", "violet"],
    "beige": ["beige", "cream"],
}
COLOUR_ZH = {
    "red": ["红色"],
    "orange": ["橙色", "橘色"],
    "yellow": ["黄色"],
    "green": ["绿色"],
    "blue": ["蓝色"],
    "purple": ["紫色"],
    "white": ["白色"],
    "black": ["黑色"],
    "gray": ["灰色"],
    "pink": ["粉色", "粉红色"],
    "sky blue": ["天蓝色", "浅蓝色"],
    "beige": ["米色"],
    "mint": ["薄荷绿"],
    "navy": ["深蓝色", "藏青色"],
}
KIND_EN = {
    "circle": ["circle", "disc", "dot", "ball", "round shape"],
    "square": ["square", "box", "block"],
    "triangle": ["triangle"],
    "star": ["star"],
    "ring": ["ring", "donut", "hoop"],
    "heart": ["heart"],
    "diamond": ["diamond", "rhombus"],
    "cross": ["cross", "plus"],
}
KIND_ZH = {
    "circle": ["圆形", "圆", "圆圈", "圆点"],
    "square": ["正方形", "方块", "方形"],
    "triangle": ["三角形", "三角"],
    "star": ["星形", "五角星", "星星"],
    "ring": ["圆环", "环", "甜甜圈"],
    "heart": ["心形", "爱心", "心"],
    "diamond": ["菱形"],
    "cross": ["十字", "十字形", "加号"],
}
SIZE_EN = {"small": ["small", "little", "tiny"], "large": ["large", "big", "huge"]}
SIZE_ZH = {"small": ["小"], "large": ["大"]}
PLACE_EN = {
    "top left": ["at the top left", "in the top left corner", "in the upper left corner", "top left"],
    "top": ["at the top", "on the top"],
    "top right": ["at the top right", "in the top right corner", "in the upper right corner", "top right"],
    "left": ["on the left", "on the left side", "at the left"],
    "center": ["in the center", "in the middle", "in the centre", "at the center"],
    "right": ["on the right", "on the right side", "at the right"],
    "bottom left": ["at the bottom left", "in the bottom left corner", "in the lower left corner", "bottom left"],
    "bottom": ["at the bottom", "on the bottom"],
    "bottom right": ["at the bottom right", "in the bottom right corner", "in the lower right corner", "bottom right"],
}
PLACE_ZH = {
    "top left": ["左上角", "左上方"],
    "top": ["上方", "上面", "顶部"],
    "top right": ["右上角", "右上方"],
    "left": ["左边", "左侧"],
    "center": ["中间", "中央", "正中间", "中心"],
    "right": ["右边", "右侧"],
    "bottom left": ["左下角", "左下方"],
    "bottom": ["下方", "下面", "底部"],
    "bottom right": ["右下角", "右下方"],
}
NUMBER_EN, NUMBER_ZH = {2: "two", 3: "three"}, {2: "两", 3: "三"}
MEASURE_ZH = {"star": ["个", "颗"], "heart": ["个", "颗"]}
RELATION_EN = {"above": ["above", "over"], "left of": ["to the left of", "left of"]}
RELATION_ZH = {"above": ["上面", "上方"], "left of": ["左边", "左侧"]}
QUOTES_EN = ['"{}"', '"{}"', '"{}"', "'{}'", "“{}”"]
QUOTES_ZH = ["“{}”", '"{}"', '"{}"', "「{}」"]
OPENINGS_EN = ["draw ", "draw ", "a picture of ", "an image of ", "please draw "]
OPENINGS_ZH = ["画", "画", "请画", "一张图，", "画面："]
